// How many cores this process may use.
#pragma once

namespace llm_ext {

// Those its affinity allows, or fewer where a quota of a Linux control group is smaller; 0 where nobody can say.
int usable_cores();

}  // namespace llm_ext
