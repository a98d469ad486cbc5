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

}  // namespace

int smallest_quota(const std::string& root, const std::string& own_groups) {
  int smallest = 0;
  const auto consider = [&](int cores) {
    if (cores > 0 && (smallest == 0 || cores < smallest)) smallest = cores;
  };
  // Lines are "number:controllers:path". Version 2 has no controllers; version 1 has a hierarchy for each set of them,
  // and that of the controller cpu can be found at its name.
  std::ifstream groups(own_groups);
  for (std::string line; std::getline(groups, line);) {
    const size_t colon = line.find(':'), second = line.find(':', colon + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(colon + 1, second - colon - 1);
    if (!controllers.empty() && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(second + 1);
    if (path == "/") path.clear();
    // In a container the path may be that of the host, of which only the root exists.
    for (;;) {
      const std::string v1 = root + "/cpu" + path;
      consider(controllers.empty() ? read_quota(root + path + "/cpu.max")
                                   : read_quota(v1 + "/cpu.cfs_quota_us", v1 + "/cpu.cfs_period_us"));
      if (path.find('/') == std::string::npos) break;
      path.erase(path.rfind('/'));
    }
  }
  return smallest;
}

int usable_cores() {
#ifdef __linux__
  // Affinities change while a process runs; quotas do not.
  static const int quota = smallest_quota("/sys/fs/cgroup", "/proc/self/cgroup");
  cpu_set_t set;
  const int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
  if (cores == 0 || quota == 0) return std::max(cores, quota);
  return std::min(cores, quota);
#else
  return 0;
#endif
}

}  // namespace llm_ext
