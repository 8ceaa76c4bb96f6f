#pragma once

#include "atb/operation.h"

namespace atb {
namespace infer {

enum ActivationType : int { ACTIVATION_UNDEFINED = 0, ACTIVATION_SWISH, ACTIVATION_SWIGLU_FORWARD };

struct RmsNormParam {
  enum RmsNormType : int { RMS_NORM_UNDEFINED = 0, RMS_NORM_NORM, RMS_NORM_PRENORM, RMS_NORM_POSTNORM };
  struct NormParam {
    float epsilon = 1e-5f;
  };
  RmsNormType layerType = RMS_NORM_UNDEFINED;
  NormParam normParam;
};

struct LinearParam {
  bool transposeA = false;
  bool transposeB = true;
  bool hasBias = true;
};

struct RopeParam {
  int32_t rotaryCoeff = 4;
};

struct GatherParam {
  int64_t axis = 0;
};

struct SplitParam {
  int32_t splitDim = 0;
  int32_t splitNum = 2;
  SVector<int32_t> splitSizes;
};

struct ConcatParam {
  int concatDim = 0;
};

struct ActivationParam {
  ActivationType activationType = ACTIVATION_UNDEFINED;
  int32_t dim = -1;
};

struct ElewiseParam {
  enum ElewiseType : int { ELEWISE_UNDEFINED = 0, ELEWISE_ADD, ELEWISE_MUL };
  ElewiseType elewiseType = ELEWISE_UNDEFINED;
};

struct ReshapeAndCacheParam {
  enum CompressType : int { COMPRESS_TYPE_UNDEFINED = 0 };
  CompressType compressType = COMPRESS_TYPE_UNDEFINED;
};

struct SelfAttentionParam {
  enum CalcType : int { UNDEFINED = 0, ENCODER, DECODER, PA_ENCODER };
  enum MaskType : int { MASK_TYPE_UNDEFINED = 0, MASK_TYPE_NORM };
  CalcType calcType = UNDEFINED;
  MaskType maskType = MASK_TYPE_UNDEFINED;
  int32_t headNum = 0;
  int32_t kvHeadNum = 0;
  float qkScale = 1.0f;
  uint32_t isTriuMask = 0;
};

struct PagedAttentionParam {
  enum MaskType : int { UNDEFINED = 0, MASK_TYPE_NORM };
  MaskType maskType = UNDEFINED;
  int32_t headNum = 0;
  int32_t kvHeadNum = 0;
  float qkScale = 1.0f;
};

}  // namespace infer
}  // namespace atb
