// The one single operator that torch_npu is let run here: "Identity", by which npu_format_cast moves a matrix
// between its plain layout (ND) and 16 x 16 tiles (FRACTAL_NZ). Every other operator fails, as without the
// vendor's library.

#include <acl/acl_op_compiler.h>

#include <cstring>
#include <string>
#include <vector>

#include "host_driver.h"

struct aclTensorDesc {
  aclDataType dtype;
  std::vector<int64_t> dims;  // as torch sees the tensor
  aclFormat format;           // of the memory
};

struct aclDataBuffer {
  void* data;
  size_t bytes;
};

namespace {

constexpr int64_t kTile = 16;

struct Matrix {
  char* data;
  int64_t rows;
  int64_t columns;
  size_t element;
  bool tiled;
  int64_t count;  // matrices, one after the other

  char* at(int64_t matrix, int64_t row, int64_t column) const {
    if (!tiled) return data + ((matrix * rows + row) * columns + column) * element;
    const int64_t row_tiles = (rows + kTile - 1) / kTile;
    const int64_t column_tiles = (columns + kTile - 1) / kTile;
    const int64_t tile = (matrix * column_tiles + column / kTile) * row_tiles + row / kTile;
    return data + (tile * kTile * kTile + row % kTile * kTile + column % kTile) * element;
  }
};

Matrix matrix_of(const aclTensorDesc& desc, void* data) {
  const size_t rank = desc.dims.size();
  int64_t count = 1;
  for (size_t axis = 0; axis + 2 < rank; ++axis) count *= desc.dims[axis];
  return {static_cast<char*>(data),
          desc.dims[rank - 2],
          desc.dims[rank - 1],
          aclDataTypeSize(desc.dtype),
          desc.format == ACL_FORMAT_FRACTAL_NZ,
          count};
}

}  // namespace

extern "C" {

size_t aclDataTypeSize(aclDataType dtype) {
  switch (dtype) {
    case ACL_FLOAT16:
    case ACL_BF16:
      return 2;
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_BOOL:
      return 1;
    case ACL_INT64:
      return 8;
    default:
      return 4;
  }
}

aclTensorDesc* aclCreateTensorDesc(aclDataType dtype, int rank, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{dtype, {dims, dims + rank}, format};
}

void aclDestroyTensorDesc(const aclTensorDesc* desc) {
  delete desc;
}

aclError aclSetTensorFormat(aclTensorDesc* desc, aclFormat format) {
  desc->format = format;
  return ACL_SUCCESS;
}

// The storage shape follows from the dims and the format.
aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) {
  return ACL_SUCCESS;
}

aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) {
  return desc->format;
}

aclDataType aclGetTensorDescType(const aclTensorDesc* desc) {
  return desc->dtype;
}

size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) {
  return desc->dims.size();
}

aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  *size = desc->dims[index];
  return ACL_SUCCESS;
}

aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) {
  return new aclDataBuffer{data, bytes};
}

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclError aclopCompileAndExecute(const char* name, int inputs, const aclTensorDesc* const input_descs[],
                                const aclDataBuffer* const input_buffers[], int outputs,
                                const aclTensorDesc* const output_descs[],
                                aclDataBuffer* const output_buffers[], const aclopAttr*, aclopEngineType,
                                aclopCompileType, const char*, aclrtStream stream) {
  ascend_host::wait_while_held("cast");
  if (std::strcmp(name, "Identity") != 0 || inputs != 1 || outputs != 1 || input_descs[0]->dims.size() < 2) {
    ascend_host::set_message(std::string("the stand-in driver has no operator ") + name);
    return ACL_ERROR_OP_NOT_FOUND;
  }
  const Matrix from = matrix_of(*input_descs[0], input_buffers[0]->data);
  const Matrix to = matrix_of(*output_descs[0], output_buffers[0]->data);
  ascend_host::count("format_casts");
  ascend_host::enqueue(stream, [from, to]() -> aclError {
    for (int64_t matrix = 0; matrix < from.count; ++matrix) {
      for (int64_t row = 0; row < from.rows; ++row) {
        for (int64_t column = 0; column < from.columns; ++column) {
          std::memcpy(to.at(matrix, row, column), from.at(matrix, row, column), from.element);
        }
      }
    }
    return ACL_SUCCESS;
  });
  return ACL_SUCCESS;
}

}  // extern "C"
