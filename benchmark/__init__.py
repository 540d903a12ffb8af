"""What `make bench` runs: the losses and a training step beside those of others. Not part of the wheel."""
