extern "C" __global__ void __launch_bounds__(64) planted(float* x, float* y) {
  __shared__ alignas(16) float s[64];
  unsigned to = __cvta_generic_to_shared(s + threadIdx.x % 16 * 4);
  if (threadIdx.x < 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(x + threadIdx.x * 4), "r"(16) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];
}
