"""The ``moepp`` console script: one command per file, imported when it is asked for."""
