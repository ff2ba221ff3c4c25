// Makes the library importable as swa_fast._C_cuda, so that Python finds and loads it; the
// operators register themselves while it loads. Its one attribute, arch_list, says for which
// devices it holds code, as TORCH_CUDA_ARCH_LIST does.
#include <Python.h>

#ifndef SWA_FAST_ARCH_LIST
#error "build with -DSWA_FAST_ARCH_LIST=..., see setup.py"
#endif

PyMODINIT_FUNC PyInit__C_cuda(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      PyModule_AddStringConstant(module, "arch_list", SWA_FAST_ARCH_LIST) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
