// The hash of contents, and blocks of bytes in files: what is found, what is taken for absent, what is left.

#include "core/file_store.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "core/content_hash.h"
#include "test.h"

using namespace modeltorch;
using test::expect;

namespace {

namespace fs = std::filesystem;

std::vector<char> some_bytes(size_t count) {
  std::vector<char> bytes(count);
  uint64_t state = 1;
  for (char& byte : bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<char>(state >> 56);
  }
  return bytes;
}

Digest hash(const std::vector<char>& bytes) {
  return content_hash(bytes.data(), bytes.size());
}

int bits_apart(const Digest& a, const Digest& b) {
  return __builtin_popcountll(a.high ^ b.high) + __builtin_popcountll(a.low ^ b.low);
}

bool all_differ(std::vector<std::string> names) {
  std::sort(names.begin(), names.end());
  return std::adjacent_find(names.begin(), names.end()) == names.end();
}

/// A folder that goes away with the test.
struct Folder {
  fs::path path;
  Folder() {
    static int counter = 0;
    const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
    path = fs::temp_directory_path() / concat("file_store_test.", now, ".", counter++);
  }
  ~Folder() { fs::remove_all(path); }
  std::string text() const { return path.string(); }
  size_t files() const { return std::distance(fs::directory_iterator(path), fs::directory_iterator()); }
};

const std::byte* raw(const std::vector<char>& bytes) {
  return reinterpret_cast<const std::byte*>(bytes.data());
}

bool holds(const FileStore& store, const Digest& name, const std::vector<char>& bytes) {
  const HostBytes found = store.find(name, bytes.size());
  return found != nullptr && std::memcmp(found.get(), bytes.data(), bytes.size()) == 0;
}

}  // namespace

TEST(every_bit_of_the_content_changes_about_half_of_the_hash) {
  for (const size_t count : {1, 15, 16, 63, 64, 65, 200}) {
    const std::vector<char> bytes = some_bytes(count);
    const Digest before = hash(bytes);
    std::vector<std::string> names{before.hex()};
    int64_t apart = 0;
    for (size_t bit = 0; bit < 8 * count; ++bit) {
      std::vector<char> other = bytes;
      other[bit / 8] = static_cast<char>(other[bit / 8] ^ (1 << bit % 8));
      const Digest after = hash(other);
      names.push_back(after.hex());
      expect(bits_apart(before, after) > 24 && bits_apart(before, after) < 104, count, " bytes, bit ", bit);
      apart += bits_apart(before, after);
    }
    const double mean = static_cast<double>(apart) / static_cast<double>(8 * count);
    expect(mean > 58.0 && mean < 70.0, count, " bytes: ", mean, " bits differ on average");
    expect(all_differ(names), count, " bytes: two flips gave one hash");
  }
}

// Changed signs of several elements, the change that weights are likeliest to see, in every pair of places.
TEST(pairs_of_sign_flips_never_meet) {
  std::vector<char> bytes(256, 0);
  std::vector<std::string> names{hash(bytes).hex()};
  for (size_t first = 1; first < bytes.size(); first += 2) {
    for (size_t second = first + 2; second < bytes.size(); second += 2) {
      std::vector<char> other = bytes;
      other[first] = other[second] = static_cast<char>(0x80);
      names.push_back(hash(other).hex());
    }
  }
  expect(all_differ(names), "two pairs gave one hash");
}

TEST(order_counts_at_every_distance) {
  const size_t part = size_t{1} << 20;
  const std::vector<char> bytes = some_bytes(2 * part + 100);
  std::vector<std::string> names{hash(bytes).hex()};
  for (const size_t distance :
       {size_t{1}, size_t{2}, size_t{16}, size_t{32}, size_t{64}, size_t{128}, part}) {
    std::vector<char> other = bytes;
    std::swap_ranges(other.begin(), other.begin() + std::min<size_t>(distance, 64), other.begin() + distance);
    names.push_back(hash(other).hex());
  }
  std::vector<char> exchanged = bytes;
  std::swap_ranges(exchanged.begin(), exchanged.begin() + part, exchanged.begin() + part);
  names.push_back(hash(exchanged).hex());
  expect(all_differ(names), "a swap went unseen");
}

TEST(length_counts_even_where_all_is_zero) {
  std::vector<std::string> names;
  for (size_t count = 0; count < 300; ++count) names.push_back(hash(std::vector<char>(count, 0)).hex());
  const size_t part = size_t{1} << 20;
  for (const size_t count : {part - 1, part, part + 1, 2 * part, 2 * part + 1})
    names.push_back(hash(std::vector<char>(count, 0)).hex());
  expect(all_differ(names), "two lengths gave one hash");
}

TEST(the_hash_depends_on_bytes_alone) {
  const std::vector<char> bytes = some_bytes(3000000);
  for (const size_t shift : {1, 3, 8}) {
    std::vector<char> moved(bytes.size() + shift);
    std::copy(bytes.begin(), bytes.end(), moved.begin() + shift);
    expect(content_hash(moved.data() + shift, bytes.size()) == hash(bytes), "shifted by ", shift);
  }
  // Files outlive a build: whoever changes these changes the layout's version with them.
  expect(hash({}).hex() == "24258549013a0a700aeac968ec384447", "nothing hashes to ", hash({}).hex());
  expect(hash(bytes).hex() == "49ebb04bcc820d371dddefa5d515643b", "3000000 bytes hash to ",
         hash(bytes).hex());
}

TEST(a_block_is_found_again_by_name_and_size) {
  const Folder folder;
  FileStore store((folder.path / "made" / "on demand").string());
  const Digest name{1, 2};
  const std::vector<char> bytes = some_bytes(100000);
  expect(store.find(name, bytes.size()) == nullptr, "nothing is there yet");
  const std::string problem = store.keep(name, raw(bytes), bytes.size());
  expect(problem.empty(), problem);
  expect(holds(store, name, bytes), "the block is there");
  expect(holds(FileStore(store.folder()), name, bytes), "for another store too");
  expect(store.find({2, 1}, bytes.size()) == nullptr, "another name");
  expect(store.find(name, bytes.size() - 1) == nullptr, "another size");
  const HostBytes held = store.find(name, bytes.size());
  fs::remove_all(folder.path);
  expect(std::memcmp(held.get(), bytes.data(), bytes.size()) == 0, "what is mapped outlives its file");
}

TEST(a_file_that_anything_is_wrong_with_is_absent_and_replaced) {
  const Folder folder;
  FileStore store(folder.text());
  const Digest name{3, 4};
  const std::vector<char> bytes = some_bytes(50000);
  const fs::path path = folder.path / (name.hex() + ".packed");
  const auto keep = [&] {
    const std::string problem = store.keep(name, raw(bytes), bytes.size());
    expect(problem.empty(), problem);
    expect(holds(store, name, bytes), "kept");
    expect(folder.files() == 1, "and nothing is left beside it");
  };
  keep();
  const auto size = static_cast<int64_t>(fs::file_size(path));
  const auto expect_absent = [&](const std::string& what) {
    expect(store.find(name, bytes.size()) == nullptr, what);
    keep();
  };
  for (int64_t at : {int64_t{0}, int64_t{7}, int64_t{8}, int64_t{16}, int64_t{24}, int64_t{40}, int64_t{56},
                     int64_t{71}, int64_t{4096}, int64_t{30000}, size - 1}) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(at);
    const int byte = file.get();
    file.seekp(at);
    file.put(static_cast<char>(byte ^ 1));
    file.close();
    expect_absent(concat("byte ", at, " is flipped"));
  }
  for (const int64_t shorter : {int64_t{0}, int64_t{10}, int64_t{4096}, size - 1, size + 1}) {
    fs::resize_file(path, shorter);
    expect_absent(concat("cut to ", shorter));
  }
  fs::remove(path);
  fs::create_directory(path);
  expect_absent("a folder has the name");
  fs::remove(path);
  fs::create_symlink(folder.path / "nowhere", path);
  expect_absent("a link to nowhere has the name");
  const Digest other{5, 6};
  expect(store.keep(other, raw(bytes), bytes.size()).empty(), "another block");
  fs::rename(folder.path / (other.hex() + ".packed"), path);
  expect_absent("another block under this name");
}

TEST(a_folder_that_cannot_be_written_is_told_and_a_full_name_is_left_alone) {
  const Folder folder;
  fs::create_directories(folder.path);
  std::ofstream(folder.path / "file") << "text";
  const std::vector<char> bytes = some_bytes(100);
  for (const char* place : {"file", "file/below"}) {
    FileStore store((folder.path / place).string());
    expect(!store.keep({1, 1}, raw(bytes), bytes.size()).empty(), place, " is no folder");
    expect(store.find({1, 1}, bytes.size()) == nullptr, place);
  }
  FileStore store(folder.text());
  const Digest name{7, 8};
  fs::create_directories(folder.path / (name.hex() + ".packed") / "somebody's");
  expect(!store.keep(name, raw(bytes), bytes.size()).empty(), "a folder with something in it stays");
  expect(fs::exists(folder.path / (name.hex() + ".packed") / "somebody's"), "and so does its content");
  expect(folder.files() == 2, "no temporary file is left");
}

TEST(temporaries_of_writers_that_died_are_removed_when_they_are_old) {
  const Folder folder;
  fs::create_directories(folder.path);
  const fs::path old = folder.path / "00.packed.tmp.1.2.3", young = folder.path / "00.packed.tmp.1.2.4",
                 foreign = folder.path / "notes.tmp.1";
  for (const fs::path& path : {old, young, foreign}) std::ofstream(path) << "part";
  const auto long_ago = fs::file_time_type::clock::now() - std::chrono::hours(2);
  fs::last_write_time(old, long_ago);
  fs::last_write_time(foreign, long_ago);
  const std::vector<char> bytes = some_bytes(100);
  expect(FileStore(folder.text()).keep({1, 1}, raw(bytes), bytes.size()).empty(), "kept");
  expect(!fs::exists(old) && fs::exists(young) && fs::exists(foreign), "only the old temporary goes");
}

TEST(writers_of_one_block_do_not_meet) {
  const Folder folder;
  const std::vector<char> bytes = some_bytes(300000);
  std::vector<std::string> problems(4);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&, thread] {
      for (int round = 0; round < 20; ++round) {
        FileStore store(folder.text());
        problems[thread] += store.keep({9, 9}, raw(bytes), bytes.size());
        if (!holds(store, {9, 9}, bytes)) ++wrong[thread];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int thread = 0; thread < 4; ++thread) {
    expect(problems[thread].empty() && wrong[thread] == 0, problems[thread], " ", wrong[thread]);
  }
  expect(folder.files() == 1, "one file is left");
}
