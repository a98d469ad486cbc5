// Runs shift_rows of a request.
#include "cuda/rnn/shift_rows.h"

#include "device.h"
#include "records.h"
#include "scheduler.h"

int main(int, char** arguments) {
  const emulator::Records request(arguments[1]);
  emulator::Answer answer(arguments[2]);
  emulator::seed(static_cast<uint64_t>(request.number("seed")));
  const size_t bytes = static_cast<size_t>(request.number("rows") * request.number("row_bytes"));
  void* to = emulator::device_memory(bytes);
  llm_ext::cuda::RowShift call = {};
  call.steps = request.number("steps");
  call.batch = request.number("batch");
  call.lengths = request.data<const int64_t>("lengths");
  call.row_offsets = request.data<const int64_t>("row_offsets");
  call.shift = static_cast<int>(request.number("shift"));
  call.row_bytes = request.number("row_bytes");
  call.from = request.data<const void>("from");
  call.from_stride = request.number("from_stride");
  call.first = request.data<const void>("first");
  call.to = to;
  const int error = llm_ext::cuda::shift_rows(call, nullptr);
  if (error) emulator::fault("shift_rows returned error " + std::to_string(error));
  answer.add("to", to, bytes);
}
