// A child of fork() has a copy of OpenMP's pool without its threads, and a parallel region would wait for them forever.
// So a child begins with one thread, for the ops and for torch: torch.set_num_threads() in the child asks for more.
#ifdef _OPENMP
#include <omp.h>
#endif
#include <pthread.h>

namespace {

void use_one_thread() {
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, use_one_thread);

}  // namespace
