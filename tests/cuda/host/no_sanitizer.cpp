// Empty implementations of AddressSanitizer's functions: the Python process does not run under it.
#include <cstddef>
#include <cstring>

extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
void __sanitizer_symbolize_pc(void*, const char*, char* text, size_t) { *text = 0; }
void* __asan_region_is_poisoned(void*, size_t) { return nullptr; }
void __asan_poison_memory_region(const volatile void*, size_t) {}
void __asan_unpoison_memory_region(const volatile void*, size_t) {}
void* __real_memcpy(void* to, const void* from, size_t bytes) { return std::memcpy(to, from, bytes); }
void* __real_memset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes); }
#define ACCESS(bytes)                            \
  void __real___asan_load##bytes(const void*) {} \
  void __real___asan_store##bytes(const void*) {}
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __real___asan_loadN(const void*, size_t) {}
void __real___asan_storeN(const void*, size_t) {}
}
