// CPU only: the number of cores that this process may use.
#pragma once

namespace llm_ext {

// The cores of its affinity mask, or fewer if a Linux control group has a smaller quota; 0 if unknown.
int usable_cores();

}  // namespace llm_ext
