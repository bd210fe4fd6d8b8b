#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "commit.h"
#include "kernel.cuh"

namespace dgemma {

namespace {

template <int kThreads>
void launch_commit(const CommitParams& params, void* stream) {
  launch("commit", is_entropy_bound(params) ? commit_kernel<kThreads, true> : commit_kernel<kThreads, false>, dim3(unsigned(params.batch)), unsigned(kThreads),
         commit_shared_bytes(kThreads), stream, params);
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
