#include "core/file_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>
#include <system_error>

#include "core/check.h"

namespace modeltorch {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'m', 't', 'p', 'a', 'c', 'k', '0', '1'};
constexpr size_t kDataOffset = 4096;  // a page, so that the data begins on one
constexpr const char* kSuffix = ".packed";
constexpr const char* kTemporary = ".tmp.";       // comes after the suffix in a temporary name
constexpr std::chrono::hours kAbandonedAfter{1};  // no writer takes this long
constexpr mode_t kReadableByAll = S_IRUSR | S_IWUSR | S_IRGRP | S_IROTH;  // as far as the umask lets

// The first bytes of a file, in the byte order of the processor: a file of the other order fits nothing.
struct Header {
  char magic[8];
  uint64_t data_offset;
  uint64_t bytes;
  Digest name;
  Digest content;
  Digest self;  // of everything before
};

Digest hash_of(const Header& header) {
  return content_hash(&header, offsetof(Header, self));
}

Header header_for(const Digest& name, const Digest& content, size_t bytes) {
  Header header{{}, kDataOffset, bytes, name, content, {}};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.self = hash_of(header);
  return header;
}

class OpenFile {
 public:
  explicit OpenFile(int descriptor) : descriptor_(descriptor) {}
  ~OpenFile() { close(); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int get() const { return descriptor_; }
  bool is_open() const { return descriptor_ >= 0; }

  /// False if the system reports a write that failed late.
  bool close() {
    const bool closed = descriptor_ < 0 || ::close(descriptor_) == 0;
    descriptor_ = -1;
    return closed;
  }

 private:
  int descriptor_;
};

std::string reason() {
  return std::generic_category().message(errno);
}

bool write_all(int descriptor, const void* data, size_t bytes) {
  const auto* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor, at, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    at += written;
    bytes -= static_cast<size_t>(written);
  }
  return true;
}

bool write_file(OpenFile& file, const Header& header, const std::byte* data) {
  char first[kDataOffset] = {};
  std::memcpy(first, &header, sizeof(header));
  return write_all(file.get(), first, sizeof(first)) && write_all(file.get(), data, header.bytes) &&
         file.close();
}

// Threads and processes never share a temporary name, not even processes that see each other as one number.
std::string temporary_suffix() {
  static std::atomic<uint64_t> counter{0};
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  return concat(kTemporary, ::getpid(), ".", now, ".", counter.fetch_add(1));
}

}  // namespace

std::string FileStore::path_of(const Digest& name) const {
  return (fs::path(folder_) / (name.hex() + kSuffix)).string();
}

HostBytes FileStore::find(const Digest& name, size_t bytes) const {
  const OpenFile file(
      ::open(path_of(name).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a pipe never waits
  struct stat status{};
  if (!file.is_open() || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return nullptr;
  const size_t size = kDataOffset + bytes;
  if (static_cast<size_t>(status.st_size) != size) return nullptr;
  void* mapped = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, file.get(), 0);
  if (mapped == MAP_FAILED) return nullptr;
  const std::shared_ptr<std::byte> whole(static_cast<std::byte*>(mapped),
                                         [size](std::byte* begin) { ::munmap(begin, size); });
#if defined(__linux__)
  // The hash below reads all of it, in huge pages where the file system has them. Asking for everything at
  // once (MADV_WILLNEED) would fill the system's cache of the file with small pages, and later reads with
  // misses.
  ::madvise(mapped, size, MADV_HUGEPAGE);
#endif
  Header header;
  std::memcpy(&header, whole.get(), sizeof(header));
  const Header expected = header_for(name, header.content, bytes);
  if (std::memcmp(&header, &expected, sizeof(header)) != 0) return nullptr;
  const std::byte* data = whole.get() + kDataOffset;
  if (content_hash(data, bytes) != header.content) return nullptr;
  return {whole, data};
}

std::string FileStore::keep(const Digest& name, const std::byte* data, size_t bytes) {
  std::error_code failed;
  fs::create_directories(folder_, failed);
  if (failed) return failed.message();
  remove_leftovers();
  const std::string path = path_of(name);
  const std::string temporary = path + temporary_suffix();
  OpenFile file(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, kReadableByAll));
  if (!file.is_open()) return reason();
  const Header header = header_for(name, content_hash(data, bytes), bytes);
  std::string problem;
  if (!write_file(file, header, data)) {
    problem = reason();
  } else {
    ::rmdir(path.c_str());  // no block is a folder; anything else is replaced
    if (::rename(temporary.c_str(), path.c_str()) != 0) problem = reason();
  }
  if (!problem.empty()) ::unlink(temporary.c_str());
  return problem;
}

// Temporaries of writers that died.
void FileStore::remove_leftovers() {
  if (looked_for_leftovers_) return;
  looked_for_leftovers_ = true;
  std::error_code ignored;
  const auto now = fs::file_time_type::clock::now();
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, ignored)) {
    if (entry.path().filename().string().find(std::string(kSuffix) + kTemporary) == std::string::npos)
      continue;
    const fs::file_time_type written = entry.last_write_time(ignored);
    if (!ignored && now - written > kAbandonedAfter) fs::remove(entry.path(), ignored);
  }
}

}  // namespace modeltorch
