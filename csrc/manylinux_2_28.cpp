// For wheels only (setup.py): what a new compiler takes from a glibc above 2.28 or a libstdc++ above that of GCC 8. The
// definitions here take its place. Where an old symbol does the same, they call it, by its version.
#include <dlfcn.h>
#include <pthread.h>

#include <exception>
#include <new>
#include <sstream>

__asm__(".symver old_exp, exp@GLIBC_2.2.5");
__asm__(".symver old_log, log@GLIBC_2.2.5");
__asm__(".symver old_trylock, pthread_mutex_trylock@GLIBC_2.2.5");
__asm__(".symver old_dlsym, dlsym@GLIBC_2.2.5");
__asm__(".symver copy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver destroy_exception_ptr, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

extern "C" {

double old_exp(double x);
double old_log(double x);
int old_trylock(pthread_mutex_t* mutex) noexcept;
void* old_dlsym(void* library, const char* name) noexcept;
void copy_exception_ptr(void** to, void* const* from) noexcept;
void destroy_exception_ptr(void** pointer) noexcept;

double exp(double x) { return old_exp(x); }
double log(double x) { return old_log(x); }
int pthread_mutex_trylock(pthread_mutex_t* mutex) noexcept { return old_trylock(mutex); }
void* dlsym(void* library, const char* name) noexcept { return old_dlsym(library, name); }  // torch 2.14's headers

// libstdc++ counts references without atomic operations where this is not 0. torch has threads in any case.
char __libc_single_threaded = 0;
}

// An exception_ptr is one pointer: a copy that is never destroyed adds one reference.
void std::__exception_ptr::exception_ptr::_M_addref() noexcept {
  void* copy;
  copy_exception_ptr(&copy, &_M_exception_object);
}
void std::__exception_ptr::exception_ptr::_M_release() noexcept { destroy_exception_ptr(&_M_exception_object); }

void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;
