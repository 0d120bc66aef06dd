// The module `vrpo_kernels._C`: importing it loads this library, whose static initialisers register the ops
// under torch.ops.vrpo. Each op lives in its own file as a TORCH_LIBRARY_FRAGMENT.

#include <Python.h>

#include <torch/library.h>

TORCH_LIBRARY(vrpo, m) {}

extern "C" PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
