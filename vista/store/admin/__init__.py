"""Operations on stores: statistics, verification, rollback, compaction, copies, Parquet export and import."""
