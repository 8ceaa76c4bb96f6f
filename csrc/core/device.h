#pragma once

#include <cstdint>
#include <ostream>

namespace modeltorch {

/// kMeta has no memory; kOther stands for the devices that have no name here.
enum class DeviceType : uint8_t { kCpu, kCuda, kNpu, kMeta, kOther };

/// A device: its type and its index among those of that type (0 on the CPU).
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;

  friend bool operator==(const Device&, const Device&) = default;

  friend std::ostream& operator<<(std::ostream& out, const Device& device) {
    constexpr const char* kNames[] = {"cpu", "cuda", "npu", "meta", "another device"};
    out << kNames[static_cast<int>(device.type)];
    const bool has_index = device.type == DeviceType::kCuda || device.type == DeviceType::kNpu;
    return has_index ? out << ':' << device.index : out;
  }
};

}  // namespace modeltorch
