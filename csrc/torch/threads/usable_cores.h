// CPU only: the number of cores that this process may use.
#pragma once

#include <string>

namespace llm_ext {

// The cores of its affinity mask, or fewer if a Linux control group has a smaller quota; 0 if unknown.
int usable_cores();

// The smallest quota in cores, rounded up, of a process's control groups, from its own up to the root; 0: no limit.
// `root` is where control groups are mounted, `own_groups` the file that says which are those of the process.
int smallest_quota(const std::string& root, const std::string& own_groups);

}  // namespace llm_ext
