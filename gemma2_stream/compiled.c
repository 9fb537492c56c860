/* All that compiled.py compiles: in one go, since the compiler's headers take longer than this. */

#include "products.c"
#include "norms.c"
#include "attention.c"
