// The files of records that a program of the emulator is asked by and answers with; program.py describes them.
//
// Memory of the device is memory of the host, each piece with ASan's red zones around it and watched for races.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "races.h"

namespace emulator {

// Allocates exactly `bytes` bytes, filled with a pattern that is NaN in every floating type.
inline void* device_memory(size_t bytes, size_t alignment = 16) {
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes) != 0) abort();
  memset(memory, 0xff, bytes);
  races::watch(memory, bytes);
  return memory;
}

inline void free_device_memory(void* memory) {
  races::forget(memory);
  free(memory);
}

class Records {
 public:
  explicit Records(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) abort();
    int64_t length;
    while (fread(&length, sizeof length, 1, file) == 1) {
      std::string name(static_cast<size_t>(length), ' ');
      take(file, name.data(), name.size());
      take(file, &length, sizeof length);
      void* data = device_memory(static_cast<size_t>(length));
      take(file, data, static_cast<size_t>(length));
      records_[name] = {data, static_cast<size_t>(length)};
    }
    fclose(file);
  }

  bool has(const std::string& name) const { return records_.count(name) != 0; }
  size_t bytes(const std::string& name) const { return has(name) ? records_.at(name).bytes : 0; }
  // Null if there is no such record.
  template <typename T>
  T* data(const std::string& name) const {
    return has(name) ? static_cast<T*>(records_.at(name).data) : nullptr;
  }
  int64_t number(const std::string& name, int64_t otherwise = 0) const {
    return has(name) ? *data<int64_t>(name) : otherwise;
  }

 private:
  struct Record {
    void* data;
    size_t bytes;
  };
  static void take(FILE* file, void* data, size_t bytes) {
    if (bytes && fread(data, 1, bytes, file) != bytes) abort();
  }
  std::map<std::string, Record> records_;
};

class Answer {
 public:
  explicit Answer(const char* path) : file_(fopen(path, "wb")) {
    if (!file_) abort();
  }
  ~Answer() { fclose(file_); }
  void add(const std::string& name, const void* data, size_t bytes) {
    const int64_t length = static_cast<int64_t>(name.size()), size = static_cast<int64_t>(bytes);
    fwrite(&length, sizeof length, 1, file_);
    fwrite(name.data(), 1, name.size(), file_);
    fwrite(&size, sizeof size, 1, file_);
    fwrite(data, 1, bytes, file_);
  }
  void number(const std::string& name, int64_t value) { add(name, &value, sizeof value); }

 private:
  FILE* file_;
};

}  // namespace emulator
