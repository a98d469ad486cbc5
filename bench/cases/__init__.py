"""The cases: a module of builders for each family of ops, and the lists of cases for CPU and CUDA."""
