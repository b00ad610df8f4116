"""Our own kernels: C++ that the machine's compiler builds once, and what plans a lowered graph onto it."""
