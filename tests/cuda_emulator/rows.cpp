// Runs copy_rows as a request asks.
#include "cuda/rnn/shift_rows.h"

#include "device.h"
#include "records.h"

int main(int, char** arguments) {
  const emulator::Records request(arguments[1]);
  emulator::Answer answer(arguments[2]);
  emulator::seed(static_cast<uint64_t>(request.number("seed")));
  const size_t bytes = static_cast<size_t>(request.number("rows") * request.number("row_bytes"));
  void* to = emulator::device_memory(bytes);
  llm_ext::cuda::RowCopy copy = {};
  copy.steps = request.number("steps");
  copy.batch = request.number("batch");
  copy.lengths = request.data<const int64_t>("lengths");
  copy.row_offsets = request.data<const int64_t>("row_offsets");
  copy.shift = static_cast<int>(request.number("shift"));
  copy.row_bytes = request.number("row_bytes");
  copy.from = request.data<const void>("from");
  copy.from_stride = request.number("from_stride");
  copy.first = request.data<const void>("first");
  copy.to = to;
  const int error = llm_ext::cuda::copy_rows(copy, nullptr);
  if (error) emulator::fault("copy_rows returned error " + std::to_string(error));
  answer.add("to", to, bytes);
}
