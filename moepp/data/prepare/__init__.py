"""From text files to Megatron indexed files: ``moepp prepare`` and the scripts of data_tools/."""
