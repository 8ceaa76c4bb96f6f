// One device, and settings that are accepted and forgotten.

#include <cstdlib>
#include <cstring>

#include "host_driver.h"

extern "C" {

aclError aclrtGetDevice(int32_t* device) {
  *device = 0;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceCount(uint32_t* devices) {
  *devices = 1;
  return ACL_SUCCESS;
}

/// ASCEND_HOST_SOC names another chip, for tests of what depends on it.
const char* aclrtGetSocName() {
  const char* name = std::getenv("ASCEND_HOST_SOC");
  return name == nullptr ? "Ascend910B3" : name;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  static int only_context = 0;
  *context = &only_context;
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 0;
  return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

aclError aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t* value) {
  *value = 0;
  return ACL_SUCCESS;
}

}  // extern "C"
