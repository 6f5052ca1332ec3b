"""What runs a compressed prompt: the decoder loop, sequences, encoder attention, devices, records, FLOPs."""
