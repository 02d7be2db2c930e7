"""Operations with a definition in torch and fast implementations: C++ on the CPU, Triton kernels on a GPU."""
