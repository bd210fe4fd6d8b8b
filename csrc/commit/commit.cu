#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "commit.h"
#include "kernel.cuh"

namespace dgemma {

namespace {

template <int kThreads>
void launch_commit(const CommitParams& params, void* stream) {
  const auto launch_kind = [&](void (*kernel)(CommitParams)) {
    launch("commit", kernel, dim3(unsigned(params.batch)), unsigned(kThreads), commit_shared_bytes(kThreads), stream,
           params);
  };
  switch (kind_of(params)) {
    case CommitKind::kAny: return launch_kind(commit_kernel<kThreads, CommitKind::kAny>);
    case CommitKind::kEntropyBound: return launch_kind(commit_kernel<kThreads, CommitKind::kEntropyBound>);
    case CommitKind::kThreshold: return launch_kind(commit_kernel<kThreads, CommitKind::kThreshold>);
  }
}

}  // namespace

void commit_cuda(const CommitParams& params, void* stream) {
  if (params.length > kCommitMaxLength)
    throw std::runtime_error("commit: canvas of " + std::to_string(params.length) + " positions, at most " +
                             std::to_string(kCommitMaxLength) + " are supported");
  switch (commit_threads(params.length)) {
    case 32: return launch_commit<32>(params, stream);
    case 256: return launch_commit<256>(params, stream);
    case 512: return launch_commit<512>(params, stream);
    default: return launch_commit<1024>(params, stream);
  }
}

}  // namespace dgemma
