"""What a step would need on chips that are not here: memory, messages, time.

1. `topology` gives the devices of a TPU slice or of a node of GPUs, for which their own compilers
   compile on any machine, or virtual CPU devices in their place.
2. `program` builds the very step of a stage, with abstract arrays for arguments; `frozen` knows the
   weights that it only reads.
3. `plan` compiles it and reads memory, collectives (`collectives`) and the terms of its roofline.
4. `table` prints plans as Markdown.
"""
