// Stands for the CUDA runtime under an extension: what is launched goes to a function of the test's instead of to a GPU.
#include <cstddef>
#include <map>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

struct dim3 {
  unsigned x, y, z;
};

// cudaError_t
enum { kSuccess = 0, kInvalidValue = 1, kLaunchFailure = 719 };

namespace {

constexpr size_t kSharedByDefault = 48 * 1024;
constexpr unsigned kThreadsAtMost = 1024;

struct Function {
  std::string name;
  size_t shared_at_most = kSharedByDefault;
};

struct Call {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

// Kernels register before main, in the order of their files: so this one is made at its first use.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

Call configured;
int last_error = kSuccess;
std::string last_message = "no error";
size_t shared_limit = 0;
int (*launched)(const char* name, const unsigned* grid, unsigned threads, size_t shared, void** arguments) = nullptr;

int fail(int error, const std::string& message) {
  last_error = error;
  last_message = message;
  return error;
}

int launch(const void* key, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto found = functions().find(key);
  if (found == functions().end()) return fail(kInvalidValue, "a function that is not registered");
  const Function& function = found->second;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > kThreadsAtMost) return fail(kInvalidValue, "too many threads or none");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return fail(kInvalidValue, "a grid that is too large or empty");
  if (shared > function.shared_at_most) return fail(kInvalidValue, "more shared memory than was allowed");
  if (!launched) return fail(kLaunchFailure, "nobody takes launches");
  const unsigned size[3] = {grid.x, grid.y, grid.z};
  if (launched(function.name.c_str(), size, threads, shared, arguments) != 0)
    return fail(kLaunchFailure, "the kernel failed");
  return kSuccess;
}

}  // namespace

// For the test. `limit` is the shared memory that a block may be allowed on the architecture.
EXPORTED void take_launches(decltype(launched) function, size_t limit) {
  launched = function;
  shared_limit = limit;
}

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host].name = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return kSuccess;
}

int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = const_cast<void*>(function);
  return kSuccess;
}

int __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, arguments, shared);
}

// Before CUDA 13.
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void*) {
  return launch(function, grid, block, arguments, shared);
}

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute != kMaxDynamicSharedMemorySize || value < 0 || size_t(value) > shared_limit)
    return fail(kInvalidValue, "more shared memory than the architecture has");
  functions()[function].shared_at_most = size_t(value);
  return kSuccess;
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

const char* cudaGetErrorName(int error) { return error == kLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidValue"; }
const char* cudaGetErrorString(int) { return last_message.c_str(); }

int cudaDriverGetVersion(int* version) {
  *version = 99000;
  return kSuccess;
}

}  // extern "C"
