#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "core/device.h"
#include "core/dtype.h"
#include "graph/kernel.h"
#include "graph/memory_planner.h"

namespace modeltorch {

class Plan;

/// What one runner keeps on its device between steps, and the way its plans are launched there.
///
/// This class launches in line, which is all that the CPU needs. A device derives from it to read the
/// caller's current stream, to launch through a queue or as a captured graph, and to keep the handles of its
/// libraries; its kernels find it in KernelSetup. A runner has one session, and the session outlives the
/// runner's plans.
class DeviceSession {
 public:
  explicit DeviceSession(Device device) : device_(device) {}
  virtual ~DeviceSession() = default;
  DeviceSession(const DeviceSession&) = delete;
  DeviceSession& operator=(const DeviceSession&) = delete;

  Device device() const { return device_; }

  /// Every offset in the arena of a plan is a multiple of this.
  virtual size_t alignment() const { return kArenaAlignment; }

  /// Launches every node of `plan`, which is bound to `step`. A session that leaves work to another thread
  /// copies what it needs of `step`; the plan and what it is bound to stay until the next settle().
  virtual void run(Plan& plan, const StepInfo& step);

  /// Waits until the host has launched what run() left to another thread, and throws, once, what went wrong
  /// there. The runner calls it before it changes or runs a plan. It does not wait for the device.
  virtual void settle() {}

  /// True if what the last run reads and writes must stay until settle().
  virtual bool pending() const { return false; }

  /// What the session has done and holds, by name.
  virtual std::map<std::string, int64_t> counters() const { return {}; }

 private:
  Device device_;
};

using SessionFactory = std::unique_ptr<DeviceSession> (*)(Device device);

/// What a kind of device asks of the tensors it is given; asked before anything runs there.
struct DeviceTraits {
  void (*check_dtype)(DType dtype) = nullptr;  ///< throws unless it computes in this type
  bool (*has_tiled_caches)() = nullptr;        ///< see has_tiled_caches() below
};

/// Makes a device's own session and traits known; called by a static object of the device's files.
bool register_session(DeviceType type, SessionFactory factory, const DeviceTraits& traits = {});

/// Throws unless the device computes in `dtype`, as far as that is known before a kernel is made.
void check_dtype(DeviceType type, DType dtype);

/// True if paged caches lie there in tiles of 16 columns, so that callers may describe one by its tiles:
/// [blocks, kv_heads * head_size / 16, block_size, 16].
bool has_tiled_caches(DeviceType type);

/// The session of a device: its own kind if it registered one, else one that launches in line.
std::unique_ptr<DeviceSession> make_session(Device device);

}  // namespace modeltorch
