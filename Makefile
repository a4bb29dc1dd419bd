# make run    set everything up, then train the digits example in FP32 and in mixed precision
# make test   set everything up, then run all tests
# make wheel  a wheel for this torch, checked in a fresh environment
# make install-cpp PREFIX=/opt/halfstep TORCH_DIR=/path/to/libtorch   the C++ library, without Python
#
# VENV=0          use the current Python environment instead of .venv
# TORCH=2.15.0    another torch (default 2.11.0)
# CUDA=OFF        leave the CUDA kernels out (default AUTO: built where nvcc is found)

TORCH ?= 2.11.0
VENV ?= 1
CUDA ?= AUTO
PREFIX ?= /usr/local
export TORCH VENV CUDA PREFIX TORCH_DIR

.PHONY: run test wheel install-cpp clean
run:
	@bash scripts/run
test:
	@bash scripts/test
wheel:
	@bash scripts/wheel
install-cpp:
	@bash scripts/install_cpp
clean:
	rm -rf build build-* dist out python/halfstep/lib python/halfstep/include python/halfstep/share python/halfstep/_C*.so
