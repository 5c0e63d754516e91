/// How Python's arguments reach the kernels: tensors as pointers to their first element, `Nested` as a struct.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <cstdint>

#include "elements.hpp"
#include "kernels/packed.hpp"

namespace nb = nanobind;

namespace bnb {

/// The memory of a tensor. Everything else about it, Python has checked and passes where it matters.
template <class T>
struct Data {
    T *pointer = nullptr;
    operator T *() const { return pointer; }
};

/// Releases the GIL while a kernel runs.
using without_gil = nb::call_guard<nb::gil_scoped_release>;

/// Adds a kernel whose arguments may be None where their type is optional. nanobind 2.9, the last for Python 3.8, takes that only where
/// it is told to, for each argument.
template <class Kernel, class... Arguments>
void def_with_none(nb::module_ &module, const char *name, const Kernel &kernel, void (Kernel::*)(Arguments...) const) {
    module.def(name, kernel, (static_cast<void>(sizeof(Arguments)), nb::arg().none())..., without_gil());
}

template <class Kernel>
void def_with_none(nb::module_ &module, const char *name, const Kernel &kernel) {
    def_with_none(module, name, kernel, &Kernel::operator());
}

inline Packed4bit packed_tensor(
    Data<const uint8_t> packed, Data<const void> absmax, Data<const float> codebook, int64_t blocksize, std::optional<Nested> nested) {
    return {packed, {absmax, blocksize, nested.value_or(Nested{})}, codebook};
}

// One function for each family of ops adds its kernels to the module.
void bind_blockwise(nb::module_ &module);
void bind_embedding(nb::module_ &module);
void bind_four_bit(nb::module_ &module);
void bind_gemm_4bit(nb::module_ &module);
void bind_int8(nb::module_ &module);
void bind_optimizer(nb::module_ &module);

}  // namespace bnb

namespace nanobind::detail {

inline uintptr_t address(handle tensor) { return cast<uintptr_t>(tensor.attr("data_ptr")()); }

template <class T>
struct type_caster<bnb::Data<T>> {
    NB_TYPE_CASTER(bnb::Data<T>, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list *) {
        value.pointer = reinterpret_cast<T *>(address(source));
        return true;
    }
};

template <>
struct type_caster<bnb::Nested> {
    NB_TYPE_CASTER(bnb::Nested, const_name("bnb_core.ops.Nested"))

    bool from_python(handle source, uint8_t, cleanup_list *) {
        value.absmax = reinterpret_cast<const float *>(address(source.attr("absmax")));
        value.codebook = reinterpret_cast<const float *>(address(source.attr("codebook")));
        value.offset = reinterpret_cast<const float *>(address(source.attr("offset")));
        value.blocksize = cast<int64_t>(source.attr("blocksize"));
        return true;
    }
};

/// A dtype's position in bnb_cpu_neon.engine.DTYPES.
template <>
struct type_caster<bnb::DType> {
    NB_TYPE_CASTER(bnb::DType, const_name("int"))

    bool from_python(handle source, uint8_t, cleanup_list *) {
        value = static_cast<bnb::DType>(cast<int>(source));
        return true;
    }
};

}  // namespace nanobind::detail
