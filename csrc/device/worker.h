#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace modeltorch {

/// A thread that runs one task at a time and sleeps between them; joined when it goes away.
class Worker {
 public:
  /// `start` runs once on the new thread, before the first task.
  explicit Worker(std::function<void()> start) : thread_([this, start = std::move(start)] { work(start); }) {}

  ~Worker() {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  /// Hands over the next task; the caller knows that the one before has ended. A task must not throw.
  void post(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      task_ = std::move(task);
    }
    changed_.notify_all();
  }

 private:
  void work(const std::function<void()>& start) {
    start();
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stopping_ || task_ != nullptr; });
      if (task_ == nullptr) return;
      const std::function<void()> task = std::exchange(task_, nullptr);
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> task_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the members above
};

}  // namespace modeltorch
