extern "C" __global__ void __launch_bounds__(32) planted(unsigned short* x, unsigned short* w, float* y) {
  __shared__ alignas(16) unsigned short a[256];
  __shared__ alignas(16) unsigned short b[128];
  int l = threadIdx.x;
  // HERE
  for (int i = l; i < 256; i += 32) a[i] = x[i];
  for (int i = l; i < 128; i += 32) b[i] = w[i];
  __syncthreads();
  unsigned p = __cvta_generic_to_shared(a + (l % 16) * 16 + (l / 16) * 8);
  unsigned q = __cvta_generic_to_shared(b + (l % 8) * 16 + (l / 8 % 2) * 8);
  unsigned r[4], c[2];
  float d[4] = {0, 0, 0, 0};
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(p) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(c[0]), "=r"(c[1]) : "r"(q) : "memory");
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(c[0]), "r"(c[1]), "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]));
  for (int i = 0; i < 4; i++) y[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = d[i];
}
