// Calls that need no answer here: they return 0. No header is included, since every one is declared alike.

#define ACCEPT(name) \
  int name() {       \
    return 0;        \
  }

extern "C" {

ACCEPT(MsprofGetHashId)
ACCEPT(MsprofRegisterCallback)
ACCEPT(MsprofReportAdditionalInfo)
ACCEPT(MsprofReportApi)
ACCEPT(MsprofReportCompactInfo)
ACCEPT(MsprofSysCycleTime)
ACCEPT(aclAppLog)
ACCEPT(aclGetDeviceCapability)
ACCEPT(aclInit)
ACCEPT(aclSetCompileopt)
ACCEPT(aclSetTensorDescName)
ACCEPT(aclSetTensorPlaceMent)
ACCEPT(aclmdlFinalizeDump)
ACCEPT(aclmdlInitDump)
ACCEPT(aclmdlSetDump)
ACCEPT(aclopDestroyAttr)
ACCEPT(aclopSetAttrBool)
ACCEPT(aclopSetAttrDataType)
ACCEPT(aclopSetAttrFloat)
ACCEPT(aclopSetAttrInt)
ACCEPT(aclopSetAttrListBool)
ACCEPT(aclopSetAttrListFloat)
ACCEPT(aclopSetAttrListInt)
ACCEPT(aclopSetAttrListListInt)
ACCEPT(aclopSetAttrString)
ACCEPT(aclrtBinaryGetFunction)
ACCEPT(aclrtBinaryLoadFromData)
ACCEPT(aclrtCtxSetSysParamOpt)
ACCEPT(aclrtDeviceEnablePeerAccess)
ACCEPT(aclrtDeviceGetBareTgid)
ACCEPT(aclrtFreePhysical)
ACCEPT(aclrtGetFunctionAddr)
ACCEPT(aclrtGetStreamOverflowSwitch)
ACCEPT(aclrtMallocPhysical)
ACCEPT(aclrtMapMem)
ACCEPT(aclrtMemExportToShareableHandle)
ACCEPT(aclrtMemImportFromShareableHandle)
ACCEPT(aclrtMemSetPidToShareableHandle)
ACCEPT(aclrtProcessReport)
ACCEPT(aclrtReleaseMemAddress)
ACCEPT(aclrtReserveMemAddress)
ACCEPT(aclrtResetDevice)
ACCEPT(aclrtSetCurrentContext)
ACCEPT(aclrtSetDevice)
ACCEPT(aclrtSetDeviceSatMode)
ACCEPT(aclrtSetOpExecuteTimeOut)
ACCEPT(aclrtSetOpWaitTimeout)
ACCEPT(aclrtSetStreamFailureMode)
ACCEPT(aclrtSetStreamOverflowSwitch)
ACCEPT(aclrtSetSysParamOpt)
ACCEPT(aclrtUnmapMem)
ACCEPT(rtDevBinaryRegister)
ACCEPT(rtFunctionRegister)
ACCEPT(rtGetC2cCtrlAddr)
ACCEPT(rtKernelLaunch)

/// A handle that nobody looks into.
void* aclopCreateAttr() {
  static char attributes;
  return &attributes;
}

}  // extern "C"
