// A request of one user in one call: from the stored record to the scores. Plain C, mirrored by `answering.py`.
//
// Letters as in scoring.h; G fields of counters with F values per key, V rows of items.
#pragma once
#include "records.h"
#include "scoring.h"

#pragma GCC visibility push(default)
extern "C" {
struct VistaAnswering {         // what the requests of one model and one generation share
    const VistaModel *model;
    const VistaRecordLayout *layout;
    const VistaRequest *tables;  // whose tables, and those of followers, are set
    int64_t num_rows;           // V, of all tables
    const float *times;         // [num_gaps, 5M] what the time since the newest event adds; null adds nothing
    const float *weights;       // [V, actions] of events in sums over the space, by their action; null weighs all by 1
    int32_t num_actions;        // of weights
    int32_t num_gaps;           // buckets of the time between events; 0 if the model reads no times
    int32_t num_pooled;         // newest events of the second pooled vector
    int32_t num_fields;         // G; 0 if the model reads no counters
    int32_t columns;            // F
    int32_t num_days;           // horizons in time, after the first column
    int32_t has_time;           // whether the last column is an age in seconds; otherwise in events
    const double *levels;       // [64, F] value of each code
    const double *resolution;   // [F], and the next, by which values are encoded
    const double *factor;       // [F]
    const int64_t *half_lives;  // [num_days] ms
    double event_resolution, event_factor;  // the same for numbers of events
    const int32_t *const *keys;  // [G - 1] of [V]: keys of items in the fields after the first, whose keys are rows
};

// Scores of `count` rows of items. The result is 0 or an error of scoring.h; nothing is written outside the outputs.
//   record: as stored; checksum, key_hash: as of `vista_check_records`. now: ms, if `has_now`.
//   asked: whose features of the request and its pairs are set; null for none.
int32_t vista_answer(const VistaAnswering *, const uint8_t *record, int64_t length, const uint8_t *checksum,
                     const uint8_t *key_hash, int64_t now, int32_t has_now, const int64_t *rows, int64_t count,
                     const VistaRequest *asked, const float *adapter, int32_t probabilities, float *logits,
                     float *scores, int32_t threads);
int64_t vista_answering_layout(void);  // the sizes of the structures, as `vista_layout`
}
#pragma GCC visibility pop
