"""What a step would need on chips that are not here: memory, messages, time.

1. `topology` gives the devices of a TPU slice, for which the real TPU compiler compiles on any
   machine, or virtual CPU devices in place of GPUs.
2. `program` builds the very step of a stage, with abstract arrays for arguments.
3. `plan` compiles it and reads memory, collectives (`collectives`) and the terms of its roofline.
"""
