// The outputs of a program: it runs once per seed, hence in several orders of the threads, and all runs must give the
// same bits.
#pragma once

#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "device.h"
#include "records.h"
#include "scheduler.h"

namespace emulator {

inline void expect(int error, const char* what) {
  if (error) fault(std::string(what) + " returned error " + std::to_string(error));
}

struct Output {
  std::string name;
  void* data;
  size_t bytes;
};

// Memory for what kernels return.
class Outputs {
 public:
  template <typename S>
  S* add(const std::string& name, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(S);
    all_.push_back({name, device_memory(bytes), bytes});
    return static_cast<S*>(all_.back().data);
  }
  const std::vector<Output>& all() const { return all_; }
  void free() {
    for (const Output& output : all_) free_device_memory(output.data);
    all_.clear();
  }

 private:
  std::vector<Output> all_;
};

// Calls run(outputs, turn, turns) for each of the seeds of the request. All outputs go to the answer; those whose names
// are in `undefined` need not be alike.
template <typename Run>
void in_every_order(const Records& request, Answer& answer, const std::set<std::string>& undefined, const Run& run) {
  const int64_t turns = request.number("seeds", 1);
  Outputs first;
  for (int64_t turn = 0; turn < turns; ++turn) {
    seed(static_cast<uint64_t>(request.number("seed") + turn));
    Outputs outputs;
    run(outputs, turn, turns);
    if (turn == 0) {
      first = outputs;
      continue;
    }
    for (const Output& output : outputs.all())
      for (const Output& expected : first.all())
        if (output.name == expected.name && undefined.count(output.name) == 0 &&
            memcmp(output.data, expected.data, output.bytes) != 0)
          fault(output.name + " depends on the order of the threads, or on whether something else is wanted");
    outputs.free();
  }
  for (const Output& output : first.all()) answer.add(output.name, output.data, output.bytes);
}

}  // namespace emulator
