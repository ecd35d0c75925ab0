#define QROSA_ISA portable
#include "dequant_add.h"
#include "dequant_spmm.h"
#include "dropout_kernel.h"
#include "gate.h"
#include "rms_norm.h"
#include "score_accumulate.h"
#include "sddmm.h"
#include "table.h"

namespace qrosa {
const Kernels kPortableKernels = QROSA_KERNELS(portable);
}
