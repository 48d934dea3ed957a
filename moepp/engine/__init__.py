"""What turns gradients into new weights: native, DeepSpeed, FSDP2."""
