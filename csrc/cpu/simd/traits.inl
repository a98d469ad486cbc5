// Type traits in place of <type_traits>, which must not be included inside the region of an ISA.
#pragma once

#include "cpu/isa/isa.h"

namespace llm_ext {
namespace LLM_EXT_ISA_NAMESPACE {

template <typename A, typename B>
constexpr bool kSame = false;
template <typename A>
constexpr bool kSame<A, A> = true;
template <bool first, typename A, typename B>
struct Choice {
  using type = A;
};
template <typename A, typename B>
struct Choice<false, A, B> {
  using type = B;
};
template <bool first, typename A, typename B>
using Choose = typename Choice<first, A, B>::type;

// An integer as a type, for generic lambdas: decltype(x)::value.
template <int n>
struct Constant {
  static constexpr int value = n;
};

}  // namespace LLM_EXT_ISA_NAMESPACE
}  // namespace llm_ext
