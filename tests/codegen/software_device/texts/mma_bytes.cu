extern "C" __global__ void __launch_bounds__(32) planted(unsigned* x, unsigned* w, NUMBER* y) {
  int l = threadIdx.x;
  // HERE
  unsigned a[4], b[2];
  NUMBER d[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; i++) a[i] = x[(l / 4 + i % 2 * 8) * 8 + i / 2 * 4 + l % 4];
  for (int i = 0; i < 2; i++) b[i] = w[l / 4 * 8 + i * 4 + l % 4];
  asm volatile("mma.sync.aligned.m16n8k32.row.col.KINDS {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
    : "=LETTER"(d[0]), "=LETTER"(d[1]), "=LETTER"(d[2]), "=LETTER"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "LETTER"(d[0]), "LETTER"(d[1]), "LETTER"(d[2]), "LETTER"(d[3]));
  for (int i = 0; i < 4; i++) y[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = d[i];
}
