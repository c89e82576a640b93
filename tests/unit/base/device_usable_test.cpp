// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/error.hpp>

#include <gtest/gtest.h>

#include <string>

namespace mics::test {
namespace {

TEST(DeviceUsableTest, OlderDeviceThanTheBuildIsForIsNamedWithBothCapabilities) {
  for (const int found : {90, 100, 120}) {
    EXPECT_NO_THROW(device::require_capability(90, found, "device 3"));
  }
  for (const int found : {80, 86}) {
    try {
      device::require_capability(90, found, "device 3");
      ADD_FAILURE() << "no error";
    } catch (const DeviceError& error) {
      const std::string text = error.what();
      const std::string own = std::to_string(found / 10) + '.' + std::to_string(found % 10);
      EXPECT_NE(text.find("device 3: expected compute capability 9.0"), std::string::npos) << text;
      EXPECT_NE(text.find("found " + own), std::string::npos) << text;
      EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
  }
}

// The program that runs this has started Kokkos: there is a device, or the build needs none.
TEST(DeviceUsableTest, TheDeviceOfARunningProgramIsUsable) {
  EXPECT_NO_THROW(device::require_usable());
}

}  // namespace
}  // namespace mics::test
