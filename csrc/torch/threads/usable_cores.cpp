#include "torch/threads/usable_cores.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <fstream>
#include <string>

namespace llm_ext {
namespace {

// Quota in cores, rounded up; 0: no limit, or no such file. `file` holds "quota period" in microseconds, or only the
// quota if `period_file` holds the period. No limit is written as "max" or -1.
int read_quota(const std::string& file, const std::string& period_file = "") {
  std::ifstream in(file);
  double quota = 0, period = 0;
  if (!(in >> quota)) return 0;
  if (period_file.empty()) {
    in >> period;
  } else {
    std::ifstream(period_file) >> period;
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

// The smallest quota of this process's control groups, from its own up to the root.
int smallest_quota() {
  const std::string root = "/sys/fs/cgroup";
  int smallest = 0;
  const auto consider = [&](int cores) {
    if (cores > 0 && (smallest == 0 || cores < smallest)) smallest = cores;
  };
  consider(read_quota(root + "/cpu/cpu.cfs_quota_us", root + "/cpu/cpu.cfs_period_us"));
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    std::string path = line.substr(3);
    if (path == "/") path.clear();
    for (;;) {
      consider(read_quota(root + path + "/cpu.max"));
      if (path.empty()) break;
      path.erase(path.rfind('/'));
    }
  }
  return smallest;
}

}  // namespace

int usable_cores() {
#ifdef __linux__
  static const int quota = smallest_quota();  // affinities change while a process runs; quotas do not
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
  if (cores == 0 || quota == 0) return std::max(cores, quota);
  return std::min(cores, quota);
#else
  return 0;
#endif
}

}  // namespace llm_ext
