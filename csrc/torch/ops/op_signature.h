// Generates the function that is registered for an op from the list of its arguments and results.
//
// An op lists members of an argument struct and of a result struct, in the order of its schema:
//   struct GruForward {
//     using A = RnnForwardArguments;
//     using R = RnnForwardResults;
//     using Arguments = Members<&A::x, ...>;
//     using Results = Members<&R::y, ...>;
//     static R run(A&);
//   };
// OpFunction<GruForward>::call then has the C++ signature of the schema.
#pragma once

#include <optional>
#include <tuple>
#include <utility>

namespace llm_ext {

template <auto... member>
struct Members {};

// A `const T*` of an argument struct is passed as `const T&`, any other member by value.
template <auto member>
struct Argument;
template <typename Struct, typename T, const T* Struct::* member>
struct Argument<member> {
  using Type = const T&;
  static void set(Struct& arguments, const T& value) { arguments.*member = &value; }
};
template <typename Struct, bool Struct::* member>
struct Argument<member> {
  using Type = bool;
  static void set(Struct& arguments, bool value) { arguments.*member = value; }
};

// A std::optional<T> of a result struct is returned as T, and must have a value.
template <typename T>
T take_result(T& value) {
  return std::move(value);
}
template <typename T>
T take_result(std::optional<T>& value) {
  return std::move(*value);
}

template <typename Op, typename Arguments = typename Op::Arguments, typename Results = typename Op::Results>
struct OpFunction;
template <typename Op, auto... argument, auto... result>
struct OpFunction<Op, Members<argument...>, Members<result...>> {
  using R = typename Op::R;
  static std::tuple<decltype(take_result(std::declval<R&>().*result))...> call(
      typename Argument<argument>::Type... values) {
    typename Op::A arguments;
    (Argument<argument>::set(arguments, values), ...);
    R results = Op::run(arguments);
    return {take_result(results.*result)...};
  }
};

}  // namespace llm_ext
