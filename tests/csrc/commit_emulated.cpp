// Runs the CUDA kernel of commit on the host: `commit_emulated FOLDER...`, a case per folder.
#include "case_files.h"
#include "commit/kernel.cuh"

namespace dgemma {
namespace {

template <int kThreads>
void run_kernel(const CommitParams& p) {
  emulation::run({p.batch, 1, 1}, kThreads, uint32_t(commit_shared_bytes(kThreads)), [&] {
    switch (kind_of(p)) {
      case CommitKind::kAny: return commit_kernel<kThreads, CommitKind::kAny>(p);
      case CommitKind::kEntropyBound: return commit_kernel<kThreads, CommitKind::kEntropyBound>(p);
      case CommitKind::kThreshold: return commit_kernel<kThreads, CommitKind::kThreshold>(p);
    }
  });
}

void run_case(const char* folder) {
  Case c(folder);
  CommitParams p;
  p.batch = c.integer("batch");
  p.length = c.integer("length");
  p.tokens = c.tensor<int64_t>("tokens");
  p.argmax = c.tensor<int64_t>("argmax");
  p.sample = c.tensor<int64_t>("sample");
  p.entropy = c.tensor<float>("entropy");
  p.sample_prob = c.tensor<float>("sample_prob");
  p.top1_prob = c.tensor<float>("top1_prob");
  p.top2_prob = c.tensor<float>("top2_prob");
  p.candidates = c.tensor<bool>("candidates");
  p.measure = Measure(c.integer("measure"));
  p.select = Select(c.integer("select"));
  p.flags = int32_t(c.integer("flags"));
  p.k = c.row_parameter<int64_t>("k");
  p.value = c.row_parameter<float>("value");
  p.value2 = c.row_parameter<float>("value2");
  p.mask_id = c.integer("mask_id");
  p.write = Write(c.integer("write"));
  p.write_argument = c.integer("write_argument");
  p.seed = c.row_parameter<int64_t>("seed");
  p.offset = c.row_parameter<int64_t>("offset");
  p.draft = c.tensor<int64_t>("draft");
  p.history = c.tensor<int64_t>("history");
  p.finished = c.tensor<bool>("finished");
  p.depth = c.integer("depth");
  p.has_confidence = c.has("confidence");
  p.confidence = c.row_parameter<float>("confidence");

  const int64_t canvas = p.batch * p.length;
  p.new_tokens = c.output<int64_t>("new_tokens", canvas);
  p.committed = c.output<bool>("committed", canvas);
  p.num_committed = c.output<int64_t>("num_committed", p.batch);
  if (p.finished != nullptr) {
    p.new_draft = c.output<int64_t>("new_draft", canvas);
    p.new_history = c.output<int64_t>("new_history", p.depth * canvas);
    p.new_finished = c.output<bool>("new_finished", p.batch);
  }
  switch (commit_threads(p.length)) {
    case 32: run_kernel<32>(p); break;
    case 256: run_kernel<256>(p); break;
    case 512: run_kernel<512>(p); break;
    default: run_kernel<1024>(p);
  }
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
