// Weak definitions for the whole API: a call to anything that is not implemented aborts with its
// name.
#include <cstdio>
#include <cstdlib>
extern "C" {
static int unimplemented(const char* name) {
  fflush(stdout);
  fprintf(stderr, "\ngpusim: FATAL: %s is not implemented by the simulator\n", name);
  abort();
}
#define STUB(n) \
  __attribute__((weak)) int n() { return unimplemented(#n); }
#include "api_names.inc"
}
