// How many threads the others have: of the OpenMP that they are linked with, which on most machines is torch's own.

#include <omp.h>

#include <cstdint>

extern "C" void fastsae_set_threads(std::int64_t n) { omp_set_num_threads(int(n)); }
