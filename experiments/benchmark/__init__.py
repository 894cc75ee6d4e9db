"""How fast the library is: its real train step and sampler on a workload that its peers run too."""
