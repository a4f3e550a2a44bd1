// Faults made by hand, to see whether the tests catch them. kernels/faults.json lists them and scripts/kernel-faults compiles each
// by itself (-DL2P_FAULT=number) and runs the tests that must fail; in any other build there are none.
#pragma once

#ifndef L2P_FAULT
#define L2P_FAULT 0
#endif

// `faulty` where fault `number` is switched on, else `right`. Both are compiled, one is left.
#define L2P_FAULT_IF(number, faulty, right) (L2P_FAULT == (number) ? (faulty) : (right))
