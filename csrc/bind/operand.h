// An argument that is memory: an address as an int (a tensor's data_ptr), or any contiguous buffer.
//
// Addresses are trusted (stage/kernels/ checks shapes, dtypes and devices); buffers are checked here for
// size and writability, and are held until the call is over.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace agora {

class Operand {
  public:
    Operand(pybind11::handle value, int64_t bytes, bool writable, size_t align, const char* name) {
        if (PyLong_Check(value.ptr())) {
            address_ = PyLong_AsVoidPtr(value.ptr());
            if (PyErr_Occurred()) {
                PyErr_Clear();
                fail(name, "is a number too large for an address");
            }
            if (address_ == nullptr && bytes > 0) fail(name, "is a null pointer");
        } else {
            int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;
            if (PyObject_GetBuffer(value.ptr(), &view_, flags) != 0) throw pybind11::error_already_set();
            held_ = true;
            address_ = view_.buf;
            if (view_.len < bytes)
                fail(name, "holds " + std::to_string(view_.len) + " bytes, " + std::to_string(bytes) +
                               " are needed");
        }
        if (reinterpret_cast<uintptr_t>(address_) % align != 0)
            fail(name, "must be aligned to " + std::to_string(align) + " bytes");
    }
    Operand(const Operand&) = delete;
    Operand& operator=(const Operand&) = delete;
    ~Operand() { release(); }

    template <typename T>
    T* as() const {
        return static_cast<T*>(address_);
    }

  private:
    // The destructor does not run for an object whose constructor threw.
    [[noreturn]] void fail(const char* name, const std::string& why) {
        release();
        throw pybind11::value_error(std::string(name) + " " + why);
    }

    void release() {
        if (held_) PyBuffer_Release(&view_);
        held_ = false;
    }

    Py_buffer view_{};
    bool held_ = false;
    void* address_ = nullptr;
};

}  // namespace agora
