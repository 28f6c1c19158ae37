"""LMDB environments and the files around them: opened safely, locked, checked, with the right modes."""
